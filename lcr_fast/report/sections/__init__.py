"""The sections of the page: each makes its content of a Page, or None where there is nothing."""
