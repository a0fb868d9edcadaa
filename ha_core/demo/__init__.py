"""The main job: a real cluster on one machine, broken in every way, and the proof that it held."""
