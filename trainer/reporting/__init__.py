"""Results for people: summary, tables, HTML."""
