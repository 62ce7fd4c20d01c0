-- Gives the lock KEYS[1] ARGV[2] more milliseconds from now if it has the token ARGV[1].
-- Answers 0 if not, 1 if so, 2 if so and somebody has come to wait for it since it was taken.
local owner = redis.call('GET', KEYS[1])
local wanted = owner == ARGV[1] .. '!'
if not wanted and owner ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return wanted and 2 or 1
