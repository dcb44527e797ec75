"""Edge: SQL. Tables, dialects, the group committer, reads. Speaks Chunk and cursor outward."""
