"""Writing what was trained: the adapter, the merged model, and either of them to the hub."""
