"""Token stores on disk, text that becomes them, and the batches that training reads from them."""
