"""Text to tokens to batches: tokenizer, corpus, dataset."""
