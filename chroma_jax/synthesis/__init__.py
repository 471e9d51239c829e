"""Data made by machines: questions and answers written, spoken in many voices, heard again, and kept or refused."""
