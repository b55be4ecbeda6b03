"""What a report of a run is made of: a survey of its rows, pictures of a few of them, charts, and the page itself."""
