"""What several test files share: small networks, tasks and checks, by theme."""
