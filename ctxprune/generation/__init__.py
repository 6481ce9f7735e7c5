"""How is text written? By `generate` on `batching`, steps `captured` on a GPU; `lossless` has the dense model verify,
`cascade` begins small."""
