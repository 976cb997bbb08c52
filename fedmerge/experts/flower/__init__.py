"""The Flower seam: the coordinator's and the hospitals' side of the federation. No other folder names flwr."""
