"""Files and prepared datasets to tokenised batches: builders, formats, tokenizers, batches."""
