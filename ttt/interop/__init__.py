"""Models of other programs: in from Hugging Face folders and GGUF files, and out again."""
