"""The federation: sites that train, the server that collects their experts, and what lies between."""
