"""A segment run on storage: its plan, its parts, and the proof that both agree."""
