"""The test harness: ranks as threads or as Gloo processes, random histories, and the oracle to compare with."""
