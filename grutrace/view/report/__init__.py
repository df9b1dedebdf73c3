"""The report: findings in words, each with its test, its picture and its command."""
