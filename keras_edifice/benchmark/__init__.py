"""How fast operations and architectures are, and how much memory they take."""
