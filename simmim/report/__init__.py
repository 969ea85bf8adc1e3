"""HTML reports of runs, with charts and reconstructions."""
