"""What lies on disk: base and experts, read without trusting them, and a model in memory made of one."""
