"""Host memory: the arena, page-locking, budgets, mirrors and mapped files."""
