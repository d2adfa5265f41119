"""What a run did, for people: tables, pictures and one self-contained page, from the run folder's files alone."""
