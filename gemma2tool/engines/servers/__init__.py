"""Running servers, each with a module that knows its protocol. What they send is untrusted: every value is checked."""
