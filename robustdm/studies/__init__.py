"""Studies: one command each that trains several arms, measures them and judges the claims."""
