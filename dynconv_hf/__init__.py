"""Dynamic short convolutions for Hugging Face transformers."""
