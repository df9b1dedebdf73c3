"""Commands that change the labels of a finished trace."""
