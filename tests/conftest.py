"""What all tests share."""

from hypothesis import settings

# The first call of a torch function in a process is slow: a deadline would measure that.
settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")
