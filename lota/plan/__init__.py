"""What a run needs, before it runs: its peak of memory and when that is, its files, the bytes it sends."""
