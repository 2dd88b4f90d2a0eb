"""What prepared data hold, and one page that shows a run: HTML that needs no network."""
