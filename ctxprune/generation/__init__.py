"""How is text written? By `generate` on `batching`; `lossless` has the dense model verify, `cascade` begins small."""
