"""What one GPU can show, in one report: ``benchmarks/gpu.sh``. ``benchmarks/README.md`` says what is measured."""
