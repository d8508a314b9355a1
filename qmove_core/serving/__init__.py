"""Models behind an API, on several replicas: see README.md. Nothing here imports ray by itself."""
