"""Speed alone. Every file here stands in for a slower way elsewhere, and is compared with it before it is used."""
