"""What the tests run on: ranks as threads, ranks as Gloo processes, and the oracle."""
