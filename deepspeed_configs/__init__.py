"""What only DeepSpeed knows, by name: README.md says what each file is for."""
