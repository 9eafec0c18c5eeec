"""One comparison from what the other stages left: tables, figures and what makes a comparison unfair."""
