"""Training a teacher."""
