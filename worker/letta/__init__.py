"""Edge: HTTP. URLs, parameters, status codes -> errors by reaction. The only user of the word starting_after."""
