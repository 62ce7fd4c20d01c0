-- Frees the lock KEYS[1] if it has the token ARGV[1] and nobody waits for it.
-- Answers 1 if so, 0 if it was not the token's, 2 if somebody has come to wait for it since it was
-- taken; then nothing was done.
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return owner == ARGV[1] .. '!' and 2 or 0
