"""Language models that go on learning while they read: test-time training, end to end."""
