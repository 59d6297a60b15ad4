"""The networks that come with dtrain."""
