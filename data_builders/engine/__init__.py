"""What every builder shares: stages over records, passes of one model over blocks, and the build of both."""
