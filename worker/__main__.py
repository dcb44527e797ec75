"""`python -m worker` is the console script `letta-ingest`."""

from worker.cli import main

if __name__ == "__main__":
    main()
