"""Speed against the tools that users would pick instead. Not part of the installed package."""
