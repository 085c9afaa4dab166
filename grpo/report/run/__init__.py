"""The page of one run, and the page that compares several runs."""
