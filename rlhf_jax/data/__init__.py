"""Files and prepared datasets to tokenised batches: builders, formats, chat, batches, mixing."""
