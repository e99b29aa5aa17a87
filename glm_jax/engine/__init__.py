"""From requests to steps and back: admission, pages, scheduling, dispatch, commit."""
