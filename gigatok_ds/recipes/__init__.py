"""One YAML file per model; `gigatok-ds recipes` lists them."""
