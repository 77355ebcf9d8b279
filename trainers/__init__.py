"""How the models learn, act and are judged."""
