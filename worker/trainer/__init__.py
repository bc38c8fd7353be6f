"""The trainer: one job from a folder to a folder. It knows neither SQL, nor credentials, nor the network."""
