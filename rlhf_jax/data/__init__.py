"""From files and prepared datasets to tokenised batches.

`builders` opens files, `formats` reads their rows, `batches` tokenises them and draws batches,
`mixing` splits, mixes and packs datasets, `chat` renders conversations.
"""
