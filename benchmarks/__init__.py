"""Benchmarks. Each first checks what it times, prints one line a case, and can write JSON."""
