"""Where are the keys that are left? In a `pruned_cache` of one `layer_cache` per layer, in pages of a `page_pool`."""
