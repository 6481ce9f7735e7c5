"""How does text become batches? From files to documents, token ids, a store and rows: a function of seed and step."""
